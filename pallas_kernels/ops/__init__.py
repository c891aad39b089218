"""One folder per operation.

`api.py` has the contract, the validation and the table of implementations; `reference.py` is the float32
oracle, `xla.py` the portable implementation. References share `oracle.py`, XLA shares `one_query.py`.
"""
