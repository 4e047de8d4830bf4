"""Routing a batch: each image through the branch that its gate chose."""
