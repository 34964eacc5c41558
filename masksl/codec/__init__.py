"""What compressors are made of: frames, bits, planes, coders.

No Flower.
"""
