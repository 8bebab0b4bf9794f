"""C++ sources of the kernels; `prebuilt/` holds ready libraries where an image was built with them."""
