"""Merging: an adapter folded into its base tensor by tensor, and the proof that the result answers alike."""
