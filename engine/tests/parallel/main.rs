//! Many ranks compute what one rank computes, and fail together.

mod faults;
mod faulty;
mod grid;
mod ranks;
mod switch;
mod toy;
