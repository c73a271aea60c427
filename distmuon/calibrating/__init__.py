"""How fast is this machine? Measured, fitted to the cost table, its error told (``distmuon calibrate``)."""
