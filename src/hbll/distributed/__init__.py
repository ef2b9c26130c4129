"""Stages on processes and machines of their own, and what that costs."""
