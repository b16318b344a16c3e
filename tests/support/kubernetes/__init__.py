"""What a pod on a real Kubernetes gets: its programs on a machine of their own."""
