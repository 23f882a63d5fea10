"""Window + linear attention in Triton, forward and backward (`run.py`); imported when a kernel is asked for.

| file | what |
|---|---|
| `run.py`, `backward.py` | the operation and its gradients: arguments and launches |
| `call.py` | what the launches share |
| `sizes.py` | tiles, and tables of which token stands where |
| `tiles.py` | tiles of tokens, masks, feature maps |
| `carry.py` | the folded sum before each run of chunks, and its gradient |
| `linear.py`, `linear_gradients.py` | the linear part, and its gradients |
| `attend.py` | the window part, and the outputs of both |
| `gradients.py`, `key_gradients.py` | the window's gradients: of queries, sinks and its factor; of keys and values |
| `map_gradients.py` | gradients of the feature maps' weights, and through them |
"""
