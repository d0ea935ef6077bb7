"""One script per question; results/ holds what they wrote."""
