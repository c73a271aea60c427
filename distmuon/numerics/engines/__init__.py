"""Ways to run an iteration: which products are made, in which order, of what.

``standard`` has the bits of torch.optim.Muon; ``gram`` runs polynomials on the Gram matrix and on the matrix in
turn; ``rational`` replaces nearly all products by two Cholesky factorizations.
"""
