package nb.calib.tagger

import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith

class DeviceTest {
    private fun device(soc: String, hardware: String) = DeviceInfo("samsung", "SM-S926N", "14", soc, hardware, "arm64-v8a", 10, 11800)

    @Test
    fun theChipOfTheGalaxyS24PlusIsKnown() {
        assertEquals("Exynos 2400", device("", "s5e9945").chip)
        assertEquals("Exynos 2400", device("s5e9945", "qcom").chip)
        assertEquals("Snapdragon 8 Gen 3", device("SM8650", "qcom").chip)
        assertEquals("XY1", device("XY1", "board").chip)
        assertEquals("?", device("", "").chip)
    }

    private fun states(delegates: List<String>, registered: List<String>) =
        Backends.options(delegates, registered).associate { it.id to it.state }

    @Test
    fun onlyWhatProgramAndLibraryHaveIsOffered() {
        val states = states(listOf("XnnpackBackend"), listOf("XnnpackBackend", "VulkanBackend"))
        assertEquals(State.READY, states["XnnpackBackend"])
        assertEquals(State.NOT_IN_PROGRAM, states["VulkanBackend"])
        assertEquals(State.NOT_IN_BUILD, states["EnnBackend"])
        assertEquals(State.NOT_IN_PROGRAM, states[""])
    }

    @Test
    fun aProgramForAnNpuIsNotOfferedWithoutItsLibrary() {
        val states = states(listOf("EnnBackend"), listOf("XnnpackBackend"))
        assertEquals(emptyList(), states.filterValues { it == State.READY }.keys.toList())
        assertEquals(State.NOT_IN_BUILD, states["EnnBackend"])
        assertEquals("EnnBackend", assertFailsWith<Refusal> { Backends.check(listOf("EnnBackend"), listOf("XnnpackBackend")) }.detail)
    }

    @Test
    fun plainOperatorsAndUnknownDelegatesHaveTheirPlace() {
        assertEquals(State.READY, states(emptyList(), listOf("XnnpackBackend"))[""])
        assertEquals(State.READY, states(listOf("NewBackend"), listOf("NewBackend"))["NewBackend"])
    }
}
