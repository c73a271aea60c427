"""The step before the GPUs are rented: who owns what, how long it takes, and what would be better (``distmuon plan``).

Models are built on torch's meta device, without weights, and no process group is made.
"""
