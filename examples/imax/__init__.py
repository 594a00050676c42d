"""IMAX in miniature: image-centric against decentralised annotation, on synthetic chest radiographs."""
