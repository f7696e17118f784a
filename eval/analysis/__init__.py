"""`ldm-deploy analyze`: what a reference's latents look like, what it costs, and what other latents would lose."""
