"""Tests of pyvmd, one folder per tier."""
