"""Every solver against a converged reference, and against the samplers of other libraries."""
