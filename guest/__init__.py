"""The tiny guest: what builds it, what runs in it, and the client that asks it questions."""
