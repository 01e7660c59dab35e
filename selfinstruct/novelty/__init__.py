"""Exact novelty: is a text too similar (ROUGE-L) to one that is already there?"""
