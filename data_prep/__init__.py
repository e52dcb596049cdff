"""Offline stage: face videos to sharded ArrayRecord tubelets."""
