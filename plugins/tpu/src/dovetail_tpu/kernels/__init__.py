"""Kernels of the platform in JAX and Pallas. Nothing here knows torch, so every bridge uses the same ones.

Shapes: T tokens, R requests, H query heads, N key/value heads, K elements per head (Kp: rounded up to whole lanes of
128), P tokens per page, B pages per request, X = pages × P places in the cache, V visits, L keys of one step.
"""
