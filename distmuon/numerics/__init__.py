"""What is computed: pure functions of tensors that know no ranks, parameters or process groups."""
