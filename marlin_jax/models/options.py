"""Names that the networks' options accept.

The module imports no jax, so that a configuration is checked before jax starts.
"""

DTYPES = ("float32", "bfloat16")

# softmax_attention.attend describes each; 'auto' is resolved by `choose`.
ATTENTION = ("auto", "plain", "chunked", "by_head", "cudnn", "flash")

# Rematerialisation: 'none', or a key of vit.REMAT_POLICIES.
REMAT = ("none", "dots", "full")
