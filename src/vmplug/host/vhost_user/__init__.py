"""Vhost-user: the processes that serve devices over a socket.

In: numbers of the store, and paths of sockets. Out: `VhostUserSocket`, with what its backend says.
"""
