"""A vhost-user backend: the process at the other end of a vhost-user device, in pure Python.

    python -m tests.support.vhost_user net SOCKET
    python -m tests.support.vhost_user scsi SOCKET IMAGE

In comes a listening socket; out go the answers to a driver in a guest. From below:

    messages    what front end and back end say to each other on the socket
    virtqueue   the guest's memory and the rings in it
    session     one front end's conversation, with `Device` behind it, well- or ill-behaved
    net, scsi   the two devices
"""
