"""Seconds, bytes and flops."""
