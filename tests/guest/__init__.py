"""Tests: tier guest."""
