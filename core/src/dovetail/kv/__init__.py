"""The paged KV cache as the scheduler sees it: which request holds which blocks, and which blocks can be
shared.

``pool`` hands out blocks and evicts; ``hashing`` names their content; ``groups`` knows what layers with a
sliding window need; ``manager`` joins them. Nothing here touches a device.
"""
