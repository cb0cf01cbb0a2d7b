"""Tests: tier conformance."""
