"""Ascend NPUs through CANN's atc: static graphs in standard operators over one cache."""
