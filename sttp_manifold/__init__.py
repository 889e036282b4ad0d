"""Spectral tensor-train weights in PyTorch, by Householder charts or on the manifold itself."""
