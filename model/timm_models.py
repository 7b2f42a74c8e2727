"""The door to timm."""
