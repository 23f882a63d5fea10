"""The recurrent operations: linear attention with decay, the gated delta rule, the selective scan.

`reference.py` has their equations, `multi_token.py` a few tokens at once, and each operation's `chunked.py` many.
`front_end.py` is what they share around a backend (dispatch, dtypes, `commit`), `layer_steps.py` runs a whole layer
between its projections by one kernel.
"""
