"""Serving parity: does vLLM, given the export, compute what this package computes?"""
