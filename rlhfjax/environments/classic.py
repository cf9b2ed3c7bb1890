"""Classic control and the bandit. Dynamics, rewards and ends are those of Gymnasium's environments of these names.

The worlds compute in the floating type of their state, float32 unless JAX is set to 64 bits; observations are
float32. Physical constants are parameters: pass others to `reset` and `step`, or `vmap` over them.
Units: metres, seconds, radians, kilograms, newtons.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhfjax.environments.environment import Environment, Step, checked, time_limit


class Bandit(NamedTuple):
    """Reward of each arm: normal, with this mean and standard deviation."""

    mean_A: jax.Array | tuple[float, ...]
    stddev: jax.Array | float = 1.0  # a scalar: the same for all arms


def bandit(mean: tuple[float, ...], stddev: float = 1.0) -> Environment:
    """An arm is pulled, a reward drawn from a normal distribution, and the episode has terminated.

    The single observation is number 0.
    """

    def reset(key: jax.Array, params: Bandit) -> tuple[jax.Array, tuple]:
        del key, params
        return jnp.int32(0), ()

    def step(key: jax.Array, state: tuple, action: jax.Array, params: Bandit) -> Step:
        reward = jnp.asarray(params.mean_A)[action] + params.stddev * jax.random.normal(key)
        return jnp.int32(0), state, reward, jnp.bool_(True), jnp.bool_(False), {}

    if not mean:
        raise ValueError("a bandit needs at least one arm")
    params = Bandit(tuple(float(x) for x in mean), stddev)
    return checked(Environment(reset, step, len(mean), (), 1, params))


class CartPole(NamedTuple):
    """Constants of the cart with a pole (Barto, Sutton & Anderson 1983), as in Gymnasium's CartPole."""

    gravity: jax.Array | float = 9.8
    cart_mass: jax.Array | float = 1.0
    pole_mass: jax.Array | float = 0.1
    half_length: jax.Array | float = 0.5  # of the pole
    force: jax.Array | float = 10.0  # of a push
    timestep: jax.Array | float = 0.02
    position_limit: jax.Array | float = 2.4
    angle_limit: jax.Array | float = 12 * 2 * jnp.pi / 360
    start_range: jax.Array | float = (
        0.05  # each part of the first state is uniform in [-start_range, start_range]
    )


class Cart(NamedTuple):
    """State of cart and pole."""

    x: jax.Array
    velocity: jax.Array
    angle: jax.Array  # 0 is upright
    spin: jax.Array


def cart_pole(limit: int | None = 500) -> Environment:
    """A pole on a cart is kept upright by pushes to the left (0) or to the right (1), explicit Euler steps.

    observation: float32 [4], position, velocity, angle, angular velocity. Reward 1 at every step, the last one
    included. Terminates where the cart or the pole leaves its range. `limit`: steps until truncation, and so the
    best return there is.
    """

    def observe(cart: Cart) -> jax.Array:
        return jnp.stack(cart).astype(jnp.float32)

    def reset(key: jax.Array, params: CartPole) -> tuple[jax.Array, Cart]:
        cart = Cart(*(jax.random.uniform(key, (4,), minval=-1.0) * params.start_range))
        return observe(cart), cart

    def step(key: jax.Array, cart: Cart, action: jax.Array, params: CartPole) -> Step:
        del key
        force = jnp.where(action == 1, params.force, -params.force)
        cart = _push(cart, force, params)
        inside = (jnp.abs(cart.x) <= params.position_limit) & (jnp.abs(cart.angle) <= params.angle_limit)
        return observe(cart), cart, jnp.float32(1), ~inside, jnp.bool_(False), {}

    return time_limit(checked(Environment(reset, step, 2, (4,), params=CartPole())), limit)


def _push(cart: Cart, force: jax.Array, params: CartPole) -> Cart:
    """One Euler step; positions advance with the velocities from before it."""
    sin, cos = jnp.sin(cart.angle), jnp.cos(cart.angle)
    mass = params.cart_mass + params.pole_mass
    moment = params.pole_mass * params.half_length
    push = (force + moment * cart.spin**2 * sin) / mass
    spin_rate = (params.gravity * sin - cos * push) / (
        params.half_length * (4 / 3 - params.pole_mass * cos**2 / mass)
    )
    acceleration = push - moment * spin_rate * cos / mass
    return Cart(
        cart.x + params.timestep * cart.velocity,
        cart.velocity + params.timestep * acceleration,
        cart.angle + params.timestep * cart.spin,
        cart.spin + params.timestep * spin_rate,
    )


class Acrobot(NamedTuple):
    """Constants of the two links (Sutton 1996; the equations of Sutton & Barto's book)."""

    gravity: jax.Array | float = 9.8
    length: jax.Array | float = 1.0  # of the first link; that of the second does not enter
    mass_1: jax.Array | float = 1.0
    mass_2: jax.Array | float = 1.0
    centre_1: jax.Array | float = 0.5  # from a link's joint to its centre of mass
    centre_2: jax.Array | float = 0.5
    inertia: jax.Array | float = 1.0  # of each link
    torque: jax.Array | float = 1.0
    timestep: jax.Array | float = 0.2
    most_spin_1: jax.Array | float = 4 * jnp.pi
    most_spin_2: jax.Array | float = 9 * jnp.pi
    start_range: jax.Array | float = (
        0.1  # each part of the first state is uniform in [-start_range, start_range]
    )


class Links(NamedTuple):
    """State of the two links. Angles in (-pi, pi]."""

    angle_1: jax.Array  # 0 hangs down
    angle_2: jax.Array  # relative to the first link
    spin_1: jax.Array
    spin_2: jax.Array


def acrobot(limit: int | None = 500) -> Environment:
    """Two hanging links are swung up by a torque of -1 (0), 0 (1) or +1 (2) at the joint between them.

    observation: float32 [6], cosine and sine of either angle, and the two angular velocities. Reward -1 a step,
    0 at the one that reaches the height of 1 above the upper joint, where the episode terminates. One step is
    one of fourth-order Runge-Kutta. `limit`: steps until truncation.
    """

    def observe(links: Links) -> jax.Array:
        one, two, spin_1, spin_2 = links
        parts = (jnp.cos(one), jnp.sin(one), jnp.cos(two), jnp.sin(two), spin_1, spin_2)
        return jnp.stack(parts).astype(jnp.float32)

    def reset(key: jax.Array, params: Acrobot) -> tuple[jax.Array, Links]:
        links = Links(*(jax.random.uniform(key, (4,), minval=-1.0) * params.start_range))
        return observe(links), links

    def step(key: jax.Array, links: Links, action: jax.Array, params: Acrobot) -> Step:
        del key
        links = _swing(links, params.torque * (action - 1), params)
        up = -jnp.cos(links.angle_1) - jnp.cos(links.angle_2 + links.angle_1) > 1
        reward = jnp.where(up, 0.0, -1.0).astype(jnp.float32)
        return observe(links), links, reward, up, jnp.bool_(False), {}

    return time_limit(checked(Environment(reset, step, 3, (6,), params=Acrobot())), limit)


def _swing(links: Links, torque: jax.Array, params: Acrobot) -> Links:
    """One step of Runge-Kutta; then the angles are brought back into their range and the velocities bounded."""

    def moved(rate: Links, time: jax.Array | float) -> Links:
        return Links(*(x + time * dx for x, dx in zip(links, rate, strict=True)))

    time = params.timestep
    first = _rate(links, torque, params)
    second = _rate(moved(first, time / 2), torque, params)
    third = _rate(moved(second, time / 2), torque, params)
    fourth = _rate(moved(third, time), torque, params)
    mean = Links(
        *((a + 2 * b + 2 * c + d) / 6 for a, b, c, d in zip(first, second, third, fourth, strict=True))
    )
    after = moved(mean, time)
    return Links(
        _wrapped(after.angle_1),
        _wrapped(after.angle_2),
        jnp.clip(after.spin_1, -params.most_spin_1, params.most_spin_1),
        jnp.clip(after.spin_2, -params.most_spin_2, params.most_spin_2),
    )


def _wrapped(angle: jax.Array) -> jax.Array:
    """The same angle in (-pi, pi]."""
    return angle - 2 * jnp.pi * jnp.ceil((angle - jnp.pi) / (2 * jnp.pi))


def _rate(links: Links, torque: jax.Array, params: Acrobot) -> Links:
    """Derivatives by time. cos(x - pi / 2) of the book is written sin(x)."""
    p, inertia = params, params.inertia
    sin_2, cos_2 = jnp.sin(links.angle_2), jnp.cos(links.angle_2)
    spin_1, spin_2 = links.spin_1, links.spin_2
    d1 = p.mass_1 * p.centre_1**2 + 2 * inertia
    d1 = d1 + p.mass_2 * (p.length**2 + p.centre_2**2 + 2 * p.length * p.centre_2 * cos_2)
    d2 = p.mass_2 * (p.centre_2**2 + p.length * p.centre_2 * cos_2) + inertia
    phi_2 = p.mass_2 * p.centre_2 * p.gravity * jnp.sin(links.angle_1 + links.angle_2)
    phi_1 = phi_2 + (p.mass_1 * p.centre_1 + p.mass_2 * p.length) * p.gravity * jnp.sin(links.angle_1)
    coupling = p.mass_2 * p.length * p.centre_2 * sin_2
    phi_1 = phi_1 - coupling * (spin_2**2 + 2 * spin_1 * spin_2)
    acceleration_2 = (torque + d2 / d1 * phi_1 - coupling * spin_1**2 - phi_2) / (
        p.mass_2 * p.centre_2**2 + inertia - d2**2 / d1
    )
    return Links(spin_1, spin_2, -(d2 * acceleration_2 + phi_1) / d1, acceleration_2)


class MountainCar(NamedTuple):
    """Constants of the car in a valley (Moore 1990), as in Gymnasium's MountainCar."""

    force: jax.Array | float = 0.001
    gravity: jax.Array | float = 0.0025
    leftmost: jax.Array | float = -1.2
    rightmost: jax.Array | float = 0.6
    most_speed: jax.Array | float = 0.07
    goal: jax.Array | float = 0.5
    goal_velocity: jax.Array | float = 0.0
    start_low: jax.Array | float = -0.6  # the first position is uniform in [start_low, start_high]
    start_high: jax.Array | float = -0.4


class Car(NamedTuple):
    """State of the car."""

    x: jax.Array
    velocity: jax.Array


def mountain_car(limit: int | None = 200) -> Environment:
    """A car too weak for the slope reaches the hill by swinging: push left (0), not at all (1), right (2).

    observation: float32 [2], position and velocity. Reward -1 at every step. Terminates at the goal. The left
    wall takes all speed away. `limit`: steps until truncation.
    """

    def observe(car: Car) -> jax.Array:
        return jnp.stack(car).astype(jnp.float32)

    def reset(key: jax.Array, params: MountainCar) -> tuple[jax.Array, Car]:
        x = jax.random.uniform(key, minval=params.start_low, maxval=params.start_high)
        car = Car(x, jnp.zeros_like(x))
        return observe(car), car

    def step(key: jax.Array, car: Car, action: jax.Array, params: MountainCar) -> Step:
        del key
        velocity = car.velocity + (action - 1) * params.force - params.gravity * jnp.cos(3 * car.x)
        velocity = jnp.clip(velocity, -params.most_speed, params.most_speed)
        x = jnp.clip(car.x + velocity, params.leftmost, params.rightmost)
        velocity = jnp.where((x == params.leftmost) & (velocity < 0), 0.0, velocity)
        car = Car(x, velocity)
        arrived = (x >= params.goal) & (velocity >= params.goal_velocity)
        return observe(car), car, jnp.float32(-1), arrived, jnp.bool_(False), {}

    return time_limit(checked(Environment(reset, step, 3, (2,), params=MountainCar())), limit)
