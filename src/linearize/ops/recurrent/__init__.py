"""The recurrent operations: linear attention with decay, the gated delta rule, the selective scan.

Each has its equation in `reference.py`, a few tokens at once in `multi_token.py`, many in `chunked.py`. What they
share: `front_end.py` (dispatch, dtypes, `commit`), `pairs.py` (masks and decays of a few tokens), `layer_steps.py` (a
whole layer between its projections by one kernel).
"""
