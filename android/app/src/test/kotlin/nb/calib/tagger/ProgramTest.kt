package nb.calib.tagger

import java.io.File
import java.nio.ByteBuffer
import java.util.Random
import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith

/** Programs that Python wrote, in the folder of the property "programs", and damaged copies of them. */
class ProgramTest {
    private val folder = File(System.getProperty("programs"))
    private fun bytes(name: String) = File(folder, name).readBytes()
    private fun read(data: ByteArray) = Program.read(ByteBuffer.wrap(data))

    @Test
    fun aProgramSaysWhatPythonSaysOfIt() {
        for (file in folder.listFiles()!!.filter { it.name.endsWith(".pte") }) {
            val wanted = Json.read(File(folder, file.name + ".json").readText()) as Map<*, *>
            val program = read(file.readBytes())
            assertEquals<Any?>(wanted["delegates"], program.delegates, file.name)
            assertEquals<Any?>(wanted["input"], program.input.map { it.toDouble() }, file.name)
            assertEquals<Any?>(wanted["methods"], program.methods, file.name)
            val spec = program.spec()
            assertEquals<Any?>(wanted["classes"], spec.classes)
            assertEquals<Any?>(listOf(wanted["size"], wanted["crop"]), listOf(spec.size.toDouble(), spec.crop))
        }
    }

    private fun fault(data: ByteArray) = assertFailsWith<Refusal> { read(data).spec() }.fault

    @Test
    fun otherFilesAreRefused() {
        for (data in listOf(ByteArray(0), ByteArray(7), ByteArray(500), "PK\u0003\u0004 a zip file".toByteArray(), "....ET12".toByteArray())) {
            assertEquals(Fault.NOT_A_PROGRAM, fault(data))
        }
    }

    @Test
    fun aFileThatIsCutShortIsRefusedAtAnyLength() {
        val whole = bytes("int8.pte")
        for (length in listOf(whole.size - 1, whole.size / 2, 4000, 100, 40)) assertEquals(Fault.TRUNCATED, fault(whole.copyOf(length)))
        for (length in listOf(39, 12, 8)) assertFailsWith<Refusal> { read(whole.copyOf(length)) }
    }

    @Test
    fun aDamagedHeadIsARefusalAndNeverACrash() {
        val whole = bytes("int8.pte")
        val random = Random(0)
        repeat(3000) {
            val damaged = whole.copyOf()
            repeat(1 + random.nextInt(8)) { damaged[random.nextInt(minOf(6000, damaged.size))] = random.nextInt().toByte() }
            try { read(damaged).spec() } catch (e: Refusal) { }
        }
    }

    @Test
    fun aProgramWithoutNotesIsNoTagger() = assertEquals(Fault.NOT_A_TAGGER, fault(File(folder, "other/bare.pte").readBytes()))
}
