"""What machines can do: work counted in FLOPs and bytes, and profiles that say how long it takes."""
