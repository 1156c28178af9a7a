"""Linear backbones: closed-form item-to-item models into which the side representation enters by its Gram matrix."""
