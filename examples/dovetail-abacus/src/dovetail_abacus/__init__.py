"""The abacus: a platform for Dovetail whose tensors live on a device of its own."""
