"""Which layers vLLM's own loaders reorder, scales included. The one table of architectures: no graph shows it.

Source: vllm/model_executor/models/bloom.py, BloomModel._repack_qkv: every tensor called query_key_value is viewed as
[heads, 3, ...], which a scale of one element does not survive. repack.py is our way around it.
"""

# model_type -> name of the layer its loader reorders.
REORDERED = {"bloom": "query_key_value"}
