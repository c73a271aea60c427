"""The proof, on a user's own model and mesh, that the sharded update is the single-device one."""
