"""The origin's benchmark again: why was its perplexity the same for every press?"""
