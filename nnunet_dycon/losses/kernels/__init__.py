"""Fast implementations of losses: computed in blocks, with hand-written gradients.

Tests compare them with reference functions such as `fecl_reference`.
"""
