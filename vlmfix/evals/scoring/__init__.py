"""Figures from answers: metrics, intervals, controls."""
