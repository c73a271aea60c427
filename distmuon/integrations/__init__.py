"""What other training libraries want in their own form; each file imports its library, and nothing imports these."""
