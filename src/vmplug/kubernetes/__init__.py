"""Which devices may Kubernetes give to its pods, and who has them?"""
