"""The embedded faces: whom they show (traits) and how they are drawn (renderer)."""
