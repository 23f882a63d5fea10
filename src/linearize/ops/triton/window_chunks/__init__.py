"""Window + linear attention in Triton, forward and backward (`run.py`); imported when a kernel is asked for.

| file | what |
|---|---|
| `run.py`, `backward.py` | the operation and its gradients: arguments and launches |
| `call.py` | what the launches share |
| `sizes.py` | tiles, and tables of which token stands where |
| `tiles.py` | tiles of tokens, masks, feature maps |
| `carry.py` | the folded sum before each run of chunks, and its gradient |
| `attend.py` | the window part, the linear part, and the outputs of both |
| `gradients.py` | the window's gradients |
| `linear_gradients.py` | the linear part's gradients, and those of the feature maps' weights |
"""
