"""Tests: tier kvm."""
