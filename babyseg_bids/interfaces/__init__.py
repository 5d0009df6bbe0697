"""Thin Nipype interfaces around the pure functions."""
