"""Routing of mixtures of experts: loads against uniform routing, beside the experts' updates and gradients."""
