"""Instruments that several questions share."""
