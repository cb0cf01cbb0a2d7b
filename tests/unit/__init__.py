"""Tests: tier unit."""
