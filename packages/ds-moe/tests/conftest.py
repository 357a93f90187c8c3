import keras
import pytest
import tensorflow as tf

# Two CPU devices, so that a strategy with two replicas can be made. Must come before any use.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)


@pytest.fixture(autouse=True)
def _seeded():
    keras.utils.set_random_seed(0)
